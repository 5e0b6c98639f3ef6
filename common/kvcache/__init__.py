"""Layout, pool, allocator and ledger of the paged KV cache."""
