"""gRPC servers and channels as every service sets them up."""
