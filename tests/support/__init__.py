"""What several test modules share: a tiny model, real servers, and throwaway SGLang plugins."""
