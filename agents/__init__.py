"""Agents: policies that play a game."""

from agents.registration import register_worlds

register_worlds()
