"""What is kept and read: pages per (sequence, layer, KV head), KV policies, decode attention."""
