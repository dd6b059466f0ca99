"""``mixquant plan``: predicted prefill and decode times, gain and memory of a recipe on a GPU that need not be here."""
