"""Make an adapter, repair it, watch it while it trains."""
