"""What only the notebooks need: exercise checks, the explorer, and plots."""
