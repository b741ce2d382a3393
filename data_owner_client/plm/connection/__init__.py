"""Ways to reach a PLM server. Each translates between messages and one transport, and decides nothing else."""
