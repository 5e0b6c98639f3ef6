"""Requests, scheduler, runner, sampler: one step after another."""
