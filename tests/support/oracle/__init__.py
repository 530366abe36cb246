"""The report's attribution as one loop over rows: slow, short and independent of the one in fxnvtx, its reference."""
