"""Addresses become opaque ids before anything is written, the same ones at every door, and nothing is taken in that would not meet."""

from __future__ import annotations

import hashlib
import hmac
import logging

import pytest

from retention_ops.errors import InputRefused, SettingsError
from retention_ops.settings import Secrets, load_settings
from retention_ops.sources.identity import Identity, held_as, identity_of, is_email
from retention_ops.sources.ingest import ingest
from retention_ops.warehouse.dialect import parquet_scan
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.versions import current_customers, current_orders, current_suppressions

KEY = "a-key-that-nobody-guesses-0123456789"
ORDERS = "order_id,customer_id,order_date,order_amount\n"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", KEY)
    return KEY


def take_in(folder, text, preset="orders", **settings):
    file = folder / f"{preset}.csv"
    file.write_text(text, encoding="utf-8")
    return ingest([file], preset, load_settings(home=folder / "home", **settings), replace=preset == "orders")


def ids(version) -> set[str]:
    with Lake(load_settings(home=version.path.parents[3])).connection() as connection:
        return {row[0] for row in connection.execute(f"SELECT customer_id FROM {parquet_scan(version.path)}").fetchall()}


def opaque(address: str) -> str:
    """As the documentation tells a shop to compute it."""
    return "h_" + hmac.new(KEY.encode(), address.strip().lower().encode(), hashlib.sha256).hexdigest()[:32]


def test_addresses_are_hashed_alike_in_orders_attributes_and_suppressions(tmp_path, key):
    report = take_in(tmp_path, ORDERS + "1,Anna@Example.com,2024-05-01,10\n2,anna@example.com,2024-05-02,10\n3,C7,2024-05-02,10\n")
    take_in(tmp_path, "customer_id,country\nanna@example.COM,DE\nC7,FR\n", "customers")
    take_in(tmp_path, "customer_id\nanna@example.com\n", "suppressions")
    settings = load_settings(home=tmp_path / "home")
    assert ids(current_orders(settings)) == ids(current_customers(settings)) == {opaque("anna@example.com"), "C7"}
    assert ids(current_suppressions(settings)) == {opaque("anna@example.com")}
    assert report.ids_hashed == 2 and report.customers == 2 and report.warnings == []


def test_no_address_and_no_key_reaches_a_file_or_a_log(tmp_path, key, caplog):
    caplog.set_level(logging.DEBUG)
    take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n")
    found = [path for path in (tmp_path / "home").rglob("*") if path.is_file()
             and (b"anna@example.com" in path.read_bytes() or KEY.encode() in path.read_bytes())]
    assert found == [] and KEY not in caplog.text and KEY not in repr(identity_of(load_settings())) and KEY in Secrets().values()


def test_without_a_key_a_file_with_addresses_is_refused_and_says_how_to_make_one(tmp_path):
    with pytest.raises(InputRefused, match=r"(?s)1 customer id looks like an e-mail.*openssl rand -hex 32") as caught:
        take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n")
    assert "anna" not in str(caught.value) and not (tmp_path / "home" / "lake").exists()
    assert take_in(tmp_path, ORDERS + "1,C1,2024-05-01,10\n").rows == 1, "ids that are no addresses need no key"


def test_a_key_that_could_be_guessed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", "short")
    with pytest.raises(SettingsError, match="5 characters; at least 32"):
        take_in(tmp_path, ORDERS + "1,C1,2024-05-01,10\n")


def test_all_hashes_every_id_and_ours_come_back_unchanged(tmp_path, key):
    take_in(tmp_path, ORDERS + "1,C1,2024-05-01,10\n", hash_customer_ids="all")
    settings = load_settings(home=tmp_path / "home", hash_customer_ids="all")
    (held,) = ids(current_orders(settings))
    assert held == opaque_all("C1")
    take_in(tmp_path, f"customer_id\n{held}\n", "suppressions", hash_customer_ids="all")
    assert ids(current_suppressions(settings)) == {held}, "a list that was handed out here can be taken in again"


def opaque_all(given: str) -> str:
    return "h_" + hmac.new(KEY.encode(), given.encode(), hashlib.sha256).hexdigest()[:32]


def test_off_keeps_addresses_and_warns(tmp_path):
    report = take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n", hash_customer_ids="off")
    assert ids(current_orders(load_settings(home=tmp_path / "home"))) == {"anna@example.com"} and len(report.warnings) == 1


@pytest.mark.parametrize(("before", "after", "words"), [
    ({"hash_customer_ids": "off"}, {}, "1 of the customer ids here are e-mail addresses"),
    ({"hash_customer_ids": "off"}, {"hash_customer_ids": "all"}, "kept as they came"),
    ({}, {"hash_customer_ids": "off"}, "hashed with RETENTION_OPS_HASH_CUSTOMER_IDS=emails"),
    ({}, {"hash_customer_ids": "all"}, "hashed with RETENTION_OPS_HASH_CUSTOMER_IDS=emails"),
])
def test_a_change_that_would_part_people_from_their_history_is_refused(tmp_path, key, before, after, words):
    take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n", **before)
    with pytest.raises(SettingsError, match=words):
        take_in(tmp_path, "customer_id\nanna@example.com\n", "suppressions", **after)


def test_another_key_is_refused_by_its_fingerprint(tmp_path, key, monkeypatch):
    take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n")
    fingerprint = current_orders(load_settings(home=tmp_path / "home")).id_key
    monkeypatch.setenv("RETENTION_OPS_ID_KEY", KEY[::-1])
    with pytest.raises(SettingsError, match=f"another key.*{fingerprint}"):
        take_in(tmp_path, ORDERS + "2,C1,2024-05-02,10\n")
    with pytest.raises(SettingsError, match="another key"):
        held_as(load_settings(home=tmp_path / "home"), "anna@example.com")


def test_every_door_finds_a_person_as_they_are_held(tmp_path, key, monkeypatch):
    take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n2,C7,2024-05-02,10\n")
    settings = load_settings(home=tmp_path / "home")
    held = opaque("anna@example.com")
    assert [held_as(settings, each) for each in (" ANNA@example.com ", held, "C7")] == [held, held, "C7"]
    monkeypatch.delenv("RETENTION_OPS_ID_KEY")
    assert held_as(settings, "C7") == "C7", "an id that is no address needs no key"
    with pytest.raises(SettingsError, match="is not set"):
        held_as(settings, "anna@example.com")


def test_a_home_of_before_goes_on_as_it_was(tmp_path, key):
    take_in(tmp_path, ORDERS + "1,anna@example.com,2024-05-01,10\n", hash_customer_ids="off")
    assert held_as(load_settings(home=tmp_path / "home"), "anna@example.com") == "anna@example.com"
    (tmp_path / "other").mkdir()
    take_in(tmp_path / "other", ORDERS + "1,C1,2024-05-01,10\n", hash_customer_ids="off")
    assert take_in(tmp_path / "other", ORDERS + "2,new@example.com,2024-05-02,10\n").ids_hashed == 1, "nothing known is an address"


def test_an_order_made_of_the_customers_id_holds_the_hash(tmp_path, key):
    file = tmp_path / "cd.txt"
    file.write_text("a@b.example 20240501 1 10.00\n")
    ingest([file], "cdnow", load_settings(home=tmp_path / "home"))
    version = current_orders(load_settings(home=tmp_path / "home"))
    with Lake(load_settings(home=tmp_path / "home")).connection() as connection:
        orders = connection.execute(f"SELECT order_id FROM {parquet_scan(version.path)}").fetchall()
    assert orders == [(f"{opaque('a@b.example')}-2024-05-01",)]


def test_what_counts_as_an_address():
    assert [each for each in ("a@b.c", "a b@c.de", "@", "a@b", "=SUM(@A1)", "a@b.c.") if is_email(each)] == ["a@b.c"]
    identity = Identity("emails", KEY.encode())
    assert identity.kept("Ä@B.de") == identity.kept("ä@b.de") and identity.mark("x") != identity.kept("x")
