"""The base of all methods: a LightningModule that scores, reduces and logs."""
