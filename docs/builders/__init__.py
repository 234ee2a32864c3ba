"""Pages and pictures of the site that are generated."""
