"""Small things that every room uses: files, versions, errors, figures, YAML. They know nothing of the rest."""
