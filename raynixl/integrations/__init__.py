"""Integrations: raynixl under the names that other projects call it by. Each is imported where that project is used."""
