#!/bin/sh
# Run once by the Postgres image on an empty volume: a user and a database each for the ledger and for Dagster, and no more rights.
set -eu
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
  -v ops_password="$RETENTION_OPS_DB_PASSWORD" -v dagster_password="$DAGSTER_POSTGRES_PASSWORD" <<'SQL'
CREATE ROLE retention_ops LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'ops_password';
CREATE ROLE dagster LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'dagster_password';
CREATE DATABASE retention_ops OWNER retention_ops;
CREATE DATABASE dagster OWNER dagster;
REVOKE ALL ON DATABASE retention_ops FROM PUBLIC;
REVOKE ALL ON DATABASE dagster FROM PUBLIC;
SQL
