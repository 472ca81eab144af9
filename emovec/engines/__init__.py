"""Serving engines that emovec plugs into. Each is a leaf of its own, loaded by the engine."""
