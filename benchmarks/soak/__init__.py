"""Half an hour of mixed traffic from twenty tenants, with floods, cuts, garbage and kills."""
