"""The hybrid prefix-cache pool: blocks of KV and state checkpoints, in tiers, of many nodes."""
