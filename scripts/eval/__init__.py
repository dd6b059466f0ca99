"""Quality of recipes on the trained tiny model, paired, with intervals."""
