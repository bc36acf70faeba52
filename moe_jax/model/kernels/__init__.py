"""The expensive operations, one function each. Differences between CPU and GPU are hidden inside the function."""
