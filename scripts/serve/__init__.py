"""Servers for people: a prefill and a decode server behind a router."""
