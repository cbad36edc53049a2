#!/bin/sh
# Puts Dagster's configuration for Postgres where every command of this home finds it, then runs what was asked for.
set -eu
umask 027
mkdir -p "$DAGSTER_HOME"
cp "$RETENTION_OPS_DEPLOY/dagster.yaml" "$DAGSTER_HOME/.dagster.yaml.$$"
mv "$DAGSTER_HOME/.dagster.yaml.$$" "$DAGSTER_HOME/dagster.yaml"
exec "$@"
