"""Small things that every room uses: files, versions, errors, figures, YAML. They import no other room."""
