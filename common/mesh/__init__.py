"""Rooms, tickets, and the sessions to bootstrap."""
