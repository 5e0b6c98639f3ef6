"""The pdmesh command."""
