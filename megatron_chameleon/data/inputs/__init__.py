"""From bytes to records: input files, their shards, lines, tar members and parquet rows."""
