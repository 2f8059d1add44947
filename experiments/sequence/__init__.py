"""Eight skills of the strings lab, learnt one after the other."""
