"""Connections and who may use them."""
