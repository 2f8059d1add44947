"""SG-OPD on the skills lab."""
