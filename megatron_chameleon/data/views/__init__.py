"""Pages and tables that show people what the data holds."""
