"""Errors with reasons; the one table from reason to gRPC and HTTP status."""
