"""The name, shape and form of every tensor in each checkpoint format, from one table.

Start with ``table.py``. A ``TensorRow`` (``tensor_rows.py``) is one row of the table for one layer,
and all conversions go through it.
"""
