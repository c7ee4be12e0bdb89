"""Making shards, and finding out what is in them and what is wrong with them."""
