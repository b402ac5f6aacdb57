"""What is measured, and against whom. Results are kept in results/<device>."""

import os

# Waiting threads sleep: else the time that OpenMP spins would count as CPU time. Read by torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
