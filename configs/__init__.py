"""What can be configured: the schema of the server and of a plan, their loading, and the shipped plans."""
