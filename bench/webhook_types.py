"""Event types for six of GitHub's webhooks, as an application that keeps what they say would write them.

All that is no link: of an object's ``…_url`` fields only the page's own is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hindsight_fast import EventType


@dataclass(frozen=True, slots=True)
class Account:
    login: str
    id: int
    gravatar_id: str
    url: str
    html_url: str
    avatar_url: str
    type: str
    site_admin: bool
    node_id: str | None = None
    name: str | None = None
    email: str | None = None


@dataclass(frozen=True, slots=True)
class Organization:
    login: str
    id: int
    node_id: str
    url: str
    avatar_url: str
    description: str | None


@dataclass(frozen=True, slots=True)
class License:
    key: str
    name: str
    spdx_id: str
    url: str | None
    node_id: str


@dataclass(frozen=True, slots=True)
class Repository:
    id: int
    node_id: str
    name: str
    full_name: str
    private: bool
    owner: Account
    html_url: str
    description: str | None
    fork: bool
    url: str
    created_at: datetime | int  # a push tells seconds since 1970
    updated_at: datetime
    pushed_at: datetime | int
    git_url: str
    ssh_url: str
    clone_url: str
    homepage: str | None
    size: int
    stargazers_count: int
    watchers_count: int
    language: str | None
    has_issues: bool
    has_projects: bool
    has_downloads: bool
    has_wiki: bool
    has_pages: bool
    forks_count: int
    archived: bool
    disabled: bool
    open_issues_count: int
    license: License | None
    forks: int
    open_issues: int
    watchers: int
    default_branch: str
    is_template: bool = False
    topics: list[str] = field(default_factory=list)
    visibility: str | None = None
    web_commit_signoff_required: bool = False
    custom_properties: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Author:
    name: str
    email: str
    username: str | None = None
    date: datetime | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    id: str
    tree_id: str
    distinct: bool
    message: str
    timestamp: datetime
    url: str
    author: Author
    committer: Author
    added: list[str]
    removed: list[str]
    modified: list[str]


@dataclass(frozen=True, slots=True)
class Push:
    ref: str
    before: str
    after: str
    created: bool
    deleted: bool
    forced: bool
    base_ref: str | None
    compare: str
    commits: list[Commit]
    head_commit: Commit | None
    repository: Repository
    pusher: Author
    sender: Account
    organization: Organization | None = None


@dataclass(frozen=True, slots=True)
class Label:
    id: int
    node_id: str
    url: str
    name: str
    color: str
    default: bool
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Milestone:
    url: str
    id: int
    node_id: str
    number: int
    title: str
    description: str | None
    creator: Account
    open_issues: int
    closed_issues: int
    state: str
    created_at: datetime
    updated_at: datetime
    due_on: datetime | None
    closed_at: datetime | None


@dataclass(frozen=True, slots=True)
class Issue:
    url: str
    html_url: str
    id: int
    node_id: str
    number: int
    title: str
    user: Account
    labels: list[Label]
    state: str
    locked: bool
    assignee: Account | None
    assignees: list[Account]
    milestone: Milestone | None
    comments: int
    created_at: datetime
    updated_at: datetime
    closed_at: datetime | None
    author_association: str
    body: str | None
    active_lock_reason: str | None = None
    draft: bool = False


@dataclass(frozen=True, slots=True)
class IssueOpened:
    action: str
    issue: Issue
    repository: Repository
    sender: Account
    organization: Organization | None = None


@dataclass(frozen=True, slots=True)
class Comment:
    url: str
    html_url: str
    id: int
    node_id: str
    user: Account
    created_at: datetime
    updated_at: datetime
    author_association: str
    body: str


@dataclass(frozen=True, slots=True)
class Commented:
    action: str
    issue: Issue
    comment: Comment
    repository: Repository
    sender: Account
    organization: Organization | None = None


@dataclass(frozen=True, slots=True)
class Created:
    ref: str
    ref_type: str
    master_branch: str
    description: str | None
    pusher_type: str
    repository: Repository
    sender: Account
    organization: Organization | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    sha: str
    url: str


@dataclass(frozen=True, slots=True)
class Verification:
    verified: bool
    reason: str
    signature: str | None
    payload: str | None


@dataclass(frozen=True, slots=True)
class CommitContent:
    author: Author
    committer: Author
    message: str
    tree: Tree
    url: str
    comment_count: int
    verification: Verification


@dataclass(frozen=True, slots=True)
class StoredCommit:
    sha: str
    node_id: str
    commit: CommitContent
    url: str
    html_url: str
    author: Account | None
    committer: Account | None
    parents: list[Tree]


@dataclass(frozen=True, slots=True)
class Branch:
    name: str
    commit: Tree
    protected: bool


@dataclass(frozen=True, slots=True)
class StatusChanged:
    id: int
    sha: str
    name: str
    context: str
    description: str | None
    state: str
    commit: StoredCommit
    branches: list[Branch]
    created_at: datetime
    updated_at: datetime
    repository: Repository
    sender: Account
    target_url: str | None = None


@dataclass(frozen=True, slots=True)
class Release:
    url: str
    html_url: str
    id: int
    node_id: str
    tag_name: str
    target_commitish: str
    name: str | None
    draft: bool
    author: Account
    prerelease: bool
    created_at: datetime
    published_at: datetime | None
    assets: list[dict[str, Any]]
    body: str | None


@dataclass(frozen=True, slots=True)
class Released:
    action: str
    release: Release
    repository: Repository
    sender: Account


WEBHOOK_TYPES: tuple[EventType[Any], ...] = (
    EventType("push", (Push,)),
    EventType("issues.opened", (IssueOpened,)),
    EventType("issue_comment.created", (Commented,)),
    EventType("create", (Created,)),
    EventType("status", (StatusChanged,)),
    EventType("release.published", (Released,)),
)
