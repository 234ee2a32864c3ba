"""Builds the pages and pictures of the site that are generated."""
