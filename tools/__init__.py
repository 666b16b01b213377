"""Programs for those who work on the project; ``documentation/`` builds the site."""
