"""Prefill methods: which keys a block of queries reads, and the attention that reads only those."""
