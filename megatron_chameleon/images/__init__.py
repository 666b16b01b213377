"""Images of outsiders: where they may lie, how they are opened, and what their pixels mean."""
