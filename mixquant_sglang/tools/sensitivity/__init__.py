"""``mixquant sensitivity``: what each linear in low precision costs in KL, and the recipe that follows from it."""
