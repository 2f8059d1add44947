"""Losses as functions of tensors, without state: no model, no trainer, no logging.

Token losses are in response space `[B, R]`, divergences are over distributions `[..., V]`, and
schedules are numbers by optimiser step.
"""
