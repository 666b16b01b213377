"""Serving over HTTP: OpenAI's formats over a ``TokenEngine``, and the page."""
