"""The shipped recipes: data only, read by ``mixquant_sglang/recipe/parse.py``."""
