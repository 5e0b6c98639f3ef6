"""The front door: HTTP and gRPC, admission, routing, streams."""
