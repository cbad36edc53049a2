#!/bin/sh
# Puts Dagster's configuration for Postgres where every command of this home finds it, then runs what was asked for.
set -eu
umask 027
mkdir -p "$DAGSTER_HOME"
# containers share this folder and start at once; $$ is the same number in each
new=$(mktemp "$DAGSTER_HOME/.dagster.yaml.XXXXXX")
cp "$RETENTION_OPS_DEPLOY/dagster.yaml" "$new"
chmod 640 "$new"
mv "$new" "$DAGSTER_HOME/dagster.yaml"
exec "$@"
