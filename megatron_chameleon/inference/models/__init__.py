"""Models whose keys and values the engine keeps: sources of ``CachedModel``."""
