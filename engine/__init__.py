"""The engine: plans, sequences, scheduler, model runner, sampler, its own process and the client to it."""
