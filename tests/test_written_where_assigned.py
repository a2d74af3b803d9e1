"""A status is written only where it was assigned, by whatever way the instance was made, loaded or saved."""

import copy
import pickle

import pytest
from django.core import serializers
from django.db import IntegrityError, connection, models, transaction
from django.db.models import F, Value
from django.db.models.functions import Greatest
from django.db.models.signals import post_save, pre_save
from django.test.utils import CaptureQueriesContext

from modelqueue import Status
from modelqueue.fields import is_assigned
from tests.testapp.models import ConcreteJob, Job, PrintJob, ProxyJob, Task

pytestmark = pytest.mark.django_db(databases=["default", "other"])

WAITING = Status.waiting(5)
FINISHED = Status.finished(7, 1)
CANCELED = Status.canceled(9, 2)
MODELS = [Job, PrintJob, ProxyJob, ConcreteJob]


def finish(job, status=FINISHED):
    """What a worker does meanwhile."""
    assert type(job)._base_manager.filter(pk=job.pk).update(status=status) == 1


def stored(job, field="status"):
    return type(job)._base_manager.values_list(field, flat=True).get(pk=job.pk)


def saved_title(job):
    job.title = "edited"
    job.save()
    return type(job)._base_manager.values_list("title", flat=True).get(pk=job.pk)


# Instances nobody has assigned a status on


def loaded(model):
    return model.objects.get(pk=created(model).pk)


def created(model):
    return model.objects.create(status=WAITING)


def saved_when_new(model):
    job = model(status=WAITING)
    job.save()
    return job


def saved_when_new_and_assigned(model):
    job = model()
    job.status = WAITING
    job.save()
    return job


def forced_in(model):
    job = model(status=WAITING)
    job.save(force_insert=True)
    return job


def saved_again(model):
    job = created(model)
    job.save()
    return job


def saved_after_assignment(model):
    job = created(model)
    job.status = Status.waiting(6)
    job.save()
    return job


def saved_after_assignment_by_name(model):
    job = created(model)
    job.status = Status.waiting(6)
    job.save(update_fields=["status"])
    return job


def refreshed(model):
    job = created(model)
    job.refresh_from_db()
    return job


def refreshed_after_assignment(model):
    job = created(model)
    job.status = CANCELED
    job.refresh_from_db()
    return job


def refreshed_in_part_after_assignment(model):
    job = created(model)
    job.status = CANCELED
    job.refresh_from_db(fields=["title", "status"])
    return job


def deleted_attribute(model):
    job = loaded(model)
    del job.status
    return job


def deleted_attribute_after_assignment(model):
    job = loaded(model)
    job.status = CANCELED
    del job.status
    assert job.status == WAITING
    return job


def deferred(model):
    return model.objects.defer("status").get(pk=created(model).pk)


def deferred_and_read(model):
    job = deferred(model)
    assert job.status == WAITING
    return job


def only_another(model):
    return model.objects.only("title").get(pk=created(model).pk)


def iterated(model):
    job = created(model)
    [found] = model.objects.filter(pk=job.pk).iterator(chunk_size=1)
    return found


def got_or_created(model):
    job, is_new = model.objects.get_or_create(title="unique", defaults={"status": WAITING})
    assert is_new
    return job


def got(model):
    got_or_created(model)
    job, is_new = model.objects.get_or_create(title="unique", defaults={"status": CANCELED})
    assert not is_new
    return job


def updated_or_created(model):
    job, _ = model.objects.update_or_create(title="unique", defaults={"status": WAITING})
    return job


def updated(model):
    updated_or_created(model)
    job, is_new = model.objects.update_or_create(title="unique", defaults={"status": Status.waiting(6)})
    assert not is_new
    return job


def shallow_copy(model):
    return copy.copy(loaded(model))


def deep_copy(model):
    return copy.deepcopy(loaded(model))


def pickled(model):
    return pickle.loads(pickle.dumps(loaded(model)))


def cleaned(model):
    job = loaded(model)
    job.full_clean()
    return job


def assigned_to_itself(model):
    job = loaded(model)
    job.status = job.status
    return job


def deserialized(model):
    [found] = serializers.deserialize("json", serializers.serialize("json", [created(model)]))
    found.save()
    found.object.refresh_from_db()
    return found.object


def duplicated(model):
    job = loaded(model)
    job.pk = job.id = None
    job.save()
    return job


def duplicated_after_assignment(model):
    job = loaded(model)
    job.pk = job.id = None
    job.status = WAITING
    job.save()
    return job


def moved_to_a_free_key(model):
    job = loaded(model)
    job.pk = job.id = job.pk + 1000
    job.status = WAITING
    job.save()
    return job


def forced_in_after_assignment(model):
    job = loaded(model)
    job.pk = job.id = None
    job.status = WAITING
    job.save(force_insert=True)
    return job


WAYS = [
    *(loaded, created, saved_when_new, saved_when_new_and_assigned, forced_in, saved_again),
    *(saved_after_assignment, saved_after_assignment_by_name),
    *(refreshed, refreshed_after_assignment, refreshed_in_part_after_assignment),
    *(
        deferred,
        deferred_and_read,
        only_another,
        deleted_attribute,
        deleted_attribute_after_assignment,
        iterated,
    ),
    *(got_or_created, got, updated_or_created, updated),
    *(shallow_copy, deep_copy, pickled, cleaned, assigned_to_itself, deserialized),
    *(duplicated, duplicated_after_assignment, moved_to_a_free_key, forced_in_after_assignment),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_save_leaves_a_status_that_was_not_assigned(way, model):
    job = way(model)
    assert stored(job) in (WAITING, Status.waiting(6))
    finish(job)
    assert saved_title(job) == "edited"
    assert stored(job) == FINISHED


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_save_writes_a_status_that_was_assigned(way, model):
    job = way(model)
    finish(job)
    job.status = CANCELED
    job.save()
    assert stored(job) == CANCELED


@pytest.mark.parametrize("way", WAYS)
def test_update_fields_leaves_a_status_that_was_not_assigned(way):
    job = way(Job)
    finish(job)
    job.save(update_fields=["title"])
    assert stored(job) == FINISHED
    job.save(update_fields=["status"])
    assert stored(job) == FINISHED


def test_bulk_created_rows_count_as_loaded():
    jobs = Job.objects.bulk_create([Job(title="a", status=WAITING), Job(title="b", status=WAITING)])
    if not connection.features.can_return_rows_from_bulk_insert:  # they do not know their keys
        for job in jobs:
            job.pk = Job.objects.values_list("pk", flat=True).get(title=job.title)
    Job.objects.update(status=FINISHED)
    assert [saved_title(job) for job in jobs] == ["edited", "edited"]
    assert [stored(job) for job in jobs] == [FINISHED, FINISHED]


def test_bulk_created_duplicates_count_as_loaded():
    job = loaded(Job)
    job.pk, job.title, job.status = None, "duplicate", Status.waiting(6)
    Job.objects.bulk_create([job])
    job.pk = Job.objects.values_list("pk", flat=True).get(title="duplicate")
    assert stored(job) == Status.waiting(6)
    finish(job)
    assert saved_title(job) == "edited"
    assert stored(job) == FINISHED


def test_new_instance_with_the_key_of_a_row_writes_its_status():
    job = created(Job)
    finish(job)
    Job(pk=job.pk, title="new", status=CANCELED).save()
    assert stored(job) == CANCELED


# Assignments


def test_int_is_assigned_as_status():
    job = loaded(Job)
    job.status = 2000000000000000060
    assert (type(job.status), job.status) == (Status, Status.waiting(6))
    job.save()
    assert stored(job) == Status.waiting(6)


def test_equal_number_is_an_assignment():
    job = loaded(Job)
    finish(job)
    job.status = int(WAITING)
    job.save()
    assert stored(job) == WAITING


def test_same_constant_is_an_assignment_each_time():
    job = Job(status=WAITING)
    job.save()
    finish(job)
    job.status = WAITING
    job.save()
    assert stored(job) == WAITING
    finish(job)
    job.status = WAITING
    job.save()
    assert stored(job) == WAITING


def test_assignment_waits_for_the_save_that_writes_it():
    job = loaded(Job)
    job.status = CANCELED
    job.save(update_fields=["title"])
    job.refresh_from_db(fields=["title"])
    assert stored(job) == WAITING
    job.save()
    assert stored(job) == CANCELED


def test_assignment_to_a_deferred_status_is_written():
    job = deferred(Job)
    job.status = CANCELED
    job.save()
    assert stored(job) == CANCELED


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda job: pickle.loads(pickle.dumps(job))])
def test_assignment_survives_a_copy(copied):
    job = loaded(Job)
    job.status = CANCELED
    twin = copied(job)
    twin.save()
    assert stored(job) == CANCELED
    finish(job)
    job.save()  # its own assignment has not been saved yet
    assert stored(job) == CANCELED
    finish(job)
    twin.save()
    assert stored(job) == FINISHED


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda job: pickle.loads(pickle.dumps(job))])
def test_copy_of_what_was_saved_in_an_open_transaction_writes_nothing(copied):
    job = loaded(Job)
    with transaction.atomic():
        job.status = CANCELED
        job.save()
        twin = copied(job)
    finish(job)
    twin.save()
    assert stored(job) == FINISHED


def test_assignment_to_a_copy_is_not_one_to_the_original():
    job = loaded(Job)
    copy.copy(job).status = CANCELED
    finish(job)
    job.save()
    assert stored(job) == FINISHED


def test_assignment_survives_a_failed_save():
    job = loaded(Job)
    job.status, job.title = CANCELED, None
    with pytest.raises(IntegrityError), transaction.atomic():
        job.save()
    assert stored(job) == WAITING
    job.title = "valid"
    job.save()
    assert stored(job) == CANCELED


def test_failed_save_does_not_bring_back_what_an_earlier_one_wrote():
    job = saved_after_assignment(Job)
    finish(job)
    job.title = None
    with pytest.raises(IntegrityError), transaction.atomic():
        job.save()
    assert saved_title(job) == "edited"
    assert stored(job) == FINISHED


def test_failed_save_leaves_alone_what_a_listener_has_read_again():
    job = loaded(Job)
    job.status = CANCELED

    def read_and_refuse(sender, instance, **arguments):
        instance.refresh_from_db()
        raise ValueError("refused")

    post_save.connect(read_and_refuse, sender=Job)
    try:
        with pytest.raises(ValueError, match="refused"), transaction.atomic():
            job.save()
    finally:
        post_save.disconnect(read_and_refuse, sender=Job)
    finish(job)
    job.save()
    assert stored(job) == FINISHED


def test_refused_status_is_still_there_for_the_next_save():
    job = loaded(Job)
    job.status = "waiting"
    with pytest.raises(ValueError, match="waiting"), transaction.atomic():
        job.save()
    job.status = CANCELED
    job.save()
    assert stored(job) == CANCELED


def test_new_row_of_a_failed_save_is_written_by_the_next():
    job = Job(status=CANCELED, title=None)
    with pytest.raises(IntegrityError), transaction.atomic():
        job.save()
    job.title = "valid"
    job.save()
    assert stored(job) == CANCELED


def test_expression_is_applied_once():
    job = loaded(Job)
    job.status = F("status") + 1
    job.save()
    assert stored(job) == WAITING + 1
    finish(job)
    assert saved_title(job) == "edited"
    assert stored(job) == FINISHED
    job.refresh_from_db()
    assert job.status == FINISHED


def test_expression_of_functions_is_written():
    job = loaded(Job)
    job.status = Greatest(F("status"), Value(int(CANCELED)))
    job.save()
    assert stored(job) == CANCELED


def test_bulk_update_writes_the_fields_it_names_and_no_other():
    job = loaded(Job)
    job.status = CANCELED
    finish(job)
    Job.objects.bulk_update([job], ["title"])
    assert stored(job) == FINISHED
    Job.objects.bulk_update([job], ["status"])
    assert stored(job) == CANCELED


def test_plain_update_writes_what_it_says():
    job = loaded(Job)
    Job.objects.update(status=int(CANCELED))
    assert (type(stored(job)), stored(job)) == (Status, CANCELED)


@pytest.mark.db_feature("supports_update_conflicts_with_target")
def test_upsert_writes_the_fields_it_names():
    job = loaded(Job)
    upserts = {"update_conflicts": True, "unique_fields": ["id"]}
    other = Job(pk=job.pk, title="upsert", status=CANCELED)
    Job.objects.bulk_create([other], update_fields=["title"], **upserts)
    assert stored(job) == WAITING
    Job.objects.bulk_create([Job(pk=job.pk, status=CANCELED)], update_fields=["status"], **upserts)
    assert stored(job) == CANCELED


# Several fields, NULL


def test_each_status_of_a_row_is_written_by_its_own_assignment():
    job = loaded(Job)
    Job.objects.update(status=FINISHED, review_status=FINISHED)
    job.review_status = CANCELED
    job.save()
    assert (stored(job), stored(job, "review_status")) == (FINISHED, CANCELED)


def test_stale_null_does_not_take_a_row_out_of_the_queue():
    job = loaded(Job)
    Job.objects.update(review_status=WAITING)
    saved_title(job)
    assert stored(job, "review_status") == WAITING


def test_stale_status_does_not_put_a_row_back_that_was_taken_out():
    job = Job.objects.create(review_status=WAITING)
    Job.objects.update(review_status=None)
    saved_title(job)
    assert stored(job, "review_status") is None


def test_null_that_was_assigned_takes_a_row_out_of_the_queue():
    job = Job.objects.create(review_status=WAITING)
    job.review_status = None
    job.save()
    assert stored(job, "review_status") is None


def test_null_is_an_assignment_on_null_too():
    job = loaded(Job)
    Job.objects.update(review_status=WAITING)
    job.review_status = None
    job.save()
    assert stored(job, "review_status") is None


def test_refresh_to_null_is_no_assignment():
    job = Job.objects.create(review_status=WAITING)
    Job.objects.update(review_status=None)
    job.refresh_from_db()
    Job.objects.update(review_status=FINISHED)
    saved_title(job)
    assert stored(job, "review_status") == FINISHED


def test_cleaning_null_is_no_assignment():
    job = loaded(Job)
    job.full_clean()
    Job.objects.update(review_status=WAITING)
    saved_title(job)
    assert stored(job, "review_status") == WAITING


# Duplicates and other databases


def test_duplicate_gets_the_status_of_its_original():
    job = loaded(Job)
    original = job.pk
    finish(job)
    job.pk = None
    job.save()
    assert job.pk != original
    assert stored(job) == WAITING
    assert Job.objects.get(pk=original).status == FINISHED


def test_row_that_was_deleted_comes_back_with_its_status():
    job = loaded(Job)
    Job.objects.all().delete()
    job.save()
    assert stored(job) == WAITING


def test_row_is_copied_to_another_database_with_its_status():
    task = Task.objects.create(status=WAITING)
    task.save(using="other")
    assert Task.objects.using("other").get().status == WAITING


def test_row_of_another_database_keeps_a_status_that_was_not_assigned():
    Task.objects.using("other").create(status=WAITING)
    task = Task.objects.using("other").get()
    Task.objects.using("other").update(status=FINISHED)
    task.save()
    assert Task.objects.using("other").get().status == FINISHED


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_assignment_rolled_back_on_another_database_is_written_by_the_next_save():
    Task.objects.using("other").create(status=WAITING)
    task = Task.objects.using("other").get()
    task.status = CANCELED
    with transaction.atomic(using="other"):
        task.save()
        transaction.set_rollback(True, using="other")
    assert Task.objects.using("other").get().status == WAITING
    task.save()
    assert Task.objects.using("other").get().status == CANCELED


# Signals and overrides


@pytest.fixture
def receiver():
    """Connect receivers, and disconnect them at the end."""
    connected = []

    def connect(signal, function):
        signal.connect(function, sender=Job)
        connected.append((signal, function))

    yield connect
    for signal, function in connected:
        signal.disconnect(function, sender=Job)


def test_receiver_of_pre_save_can_assign(receiver):
    job = loaded(Job)
    receiver(pre_save, lambda instance, **_: setattr(instance, "status", CANCELED))
    job.save()
    assert stored(job) == CANCELED


def test_receiver_of_post_save_can_assign_and_save(receiver):
    def cancel_once(instance, **_):
        if instance.title != "seen":
            instance.title, instance.status = "seen", CANCELED
            instance.save()

    receiver(post_save, cancel_once)
    job = created(Job)
    assert stored(job) == CANCELED
    finish(job)
    job.save()
    assert stored(job) == FINISHED

    job.title, job.status = "again", WAITING
    job.save()
    assert stored(job) == CANCELED
    finish(job)
    job.save()
    assert stored(job) == FINISHED


def test_receiver_of_post_save_can_save_what_is_being_saved(receiver):
    def touch_once(instance, **_):
        if instance.title != "touched":
            instance.title = "touched"
            instance.save()

    job = loaded(Job)
    receiver(post_save, touch_once)
    job.status = CANCELED
    job.save()
    assert stored(job) == CANCELED
    finish(job)
    job.save()
    assert stored(job) == FINISHED


def test_assignment_by_a_receiver_waits_for_the_next_save(receiver):
    job = loaded(Job)
    receiver(post_save, lambda instance, **_: setattr(instance, "status", CANCELED))
    job.save()
    assert stored(job) == WAITING
    job.save()
    assert stored(job) == CANCELED


def test_error_of_a_receiver_leaves_the_assignment_to_the_next_save(receiver):
    def refuse(**_):
        raise ZeroDivisionError

    job = loaded(Job)
    job.status = CANCELED
    receiver(post_save, refuse)
    with pytest.raises(ZeroDivisionError):
        job.save()
    post_save.disconnect(refuse, sender=Job)
    finish(job)
    job.save()
    assert stored(job) == CANCELED


# How


def test_attribute_reads_as_status_from_every_source():
    job = Job(status=2000000000000000050, review_status=None)
    assert (type(job.status), job.review_status) == (Status, None)
    job.save()
    assert type(job.status) is Status
    assert type(loaded(Job).status) is type(deferred(Job).status) is Status


def test_save_without_assignment_is_one_update():
    job = loaded(Job)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        job.save()
    assert [query["sql"].split()[0] for query in queries] == ["UPDATE"]


def test_arguments_may_be_given_by_position():
    job = loaded(Job)
    Job.objects.update(title="new", status=FINISHED)
    job.refresh_from_db("default", ["title"])
    assert (job.title, job.status) == ("new", WAITING)
    job.title = "mine"
    job.save_base(False, False, False, "default", ["project"])
    assert (stored(job), Job.objects.get().title) == (FINISHED, "new")


def test_deleting_an_attribute_takes_its_assignment_back():
    job = loaded(Job)
    job.status = CANCELED
    del job.status
    assert not is_assigned(job, Job._meta.get_field("status"))


def test_methods_of_a_model_are_wrapped_once_for_all_its_fields():
    for model in MODELS:
        assert model.save_base.__wrapped__ is models.Model.save_base
        assert model.refresh_from_db.__wrapped__ is models.Model.refresh_from_db


def test_deleting_an_attribute_twice_is_an_error():
    job = deleted_attribute(Job)
    with pytest.raises(AttributeError, match="status"):
        del job.status


# Fetch modes

needs_fetch_modes = pytest.mark.skipif(not hasattr(models, "FETCH_PEERS"), reason="Django 6.1 has them")


@needs_fetch_modes
def test_status_fetched_for_all_peers_is_no_assignment():
    Job.objects.bulk_create([Job(status=WAITING) for _ in range(4)])
    first, second, gone, assigned = Job.objects.fetch_mode(models.FETCH_PEERS).defer("status").order_by("pk")
    Job.objects.filter(pk=gone.pk).delete()
    assigned.status = CANCELED
    assert first.status == WAITING
    assert "status" in second.__dict__
    Job.objects.update(status=FINISHED)
    for job in (first, second, assigned):
        job.save()
    assert [stored(job) for job in (first, second, assigned)] == [FINISHED, FINISHED, CANCELED]


@needs_fetch_modes
def test_save_does_not_ask_for_a_status_whose_fetch_is_blocked():
    Job.objects.bulk_create([Job(status=WAITING) for _ in range(2)])
    jobs = list(Job.objects.fetch_mode(models.FETCH_RAISE).defer("status"))
    Job.objects.update(status=FINISHED)
    for job in jobs:
        saved_title(job)
    assert [stored(job) for job in jobs] == [FINISHED, FINISHED]
