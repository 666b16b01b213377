"""From YAML and ``section.key=value`` to plain values of the right types, with their places."""
