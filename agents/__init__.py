"""Agents: policies that play a game."""
