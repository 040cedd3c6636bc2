package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"example.com/raft"
)

// What the library answers decides what a client is told; here it answers
// whatever the test wants.
func TestAPIErrors(t *testing.T) {
	unknown := fmt.Errorf("%w: connection lost", raft.ErrOutcomeUnknown)
	expired := &raft.SessionError{Reason: raft.SessionExpired, Session: 7}
	for _, c := range []struct {
		method string
		err    error
		code   int
		text   string
		retry  bool
	}{
		{"PUT", raft.ErrNoLeader, 503, "Nothing was changed", true},
		{"PUT", fmt.Errorf("%w: %w", raft.ErrNoLeader, context.DeadlineExceeded), 503, "Nothing was changed", true},
		{"GET", raft.ErrNoLeader, 503, "send it again", true},
		{"PUT", raft.ErrOverloaded, 503, "Nothing was changed", true},
		{"DELETE", raft.ErrStopped, 503, "another", true},
		{"PUT", raft.ErrSuperseded, 503, "Nothing was changed", true},
		{"PUT", unknown, 504, "outcome is unknown", false},
		{"DELETE", unknown, 504, "outcome is unknown", false},
		{"PUT", raft.ErrCommandSize, 413, "size", false},
		{"POST", expired, 410, "open another session", false},
		{"POST", fmt.Errorf("%w: %w", raft.ErrOutcomeUnknown, expired), 410, "open another session", false},
		{"PUT", &raft.SessionError{Reason: raft.SessionWindow, Session: 7}, 429, "raise DoneBelow", false},
		{"PUT", &raft.SessionError{Reason: raft.SessionSequence, Session: 7}, 409, "not executed", false},
		{"PUT", &raft.ResultSizeError{Index: 3, Size: 1 << 20}, 500, "executed once", false},
	} {
		if c.err == raft.ErrCommandSize {
			c.text = "too large"
		}
		w := ask(&api{
			propose: func(context.Context, raft.RequestID, []byte) (raft.Result, error) { return raft.Result{}, c.err },
			store:   func(context.Context, string) (*Store, <-chan struct{}, error) { return nil, nil, c.err },
		}, c.method, "/kv/k?add=1", "v")
		if got := w.Header().Get("Outcome"); (got == "unknown") != errors.Is(c.err, raft.ErrOutcomeUnknown) {
			t.Errorf("%s, %v: Outcome %q", c.method, c.err, got)
		}
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.text) || (w.Header().Get("Retry-After") != "") != c.retry {
			t.Errorf("%s, %v: %d %q, Retry-After %q", c.method, c.err, w.Code, w.Body, w.Header().Get("Retry-After"))
		}
	}
}

// Requests that can't be executed never reach the log.
func TestAPIRefusesBadRequests(t *testing.T) {
	a := &api{timeout: time.Second, propose: func(context.Context, raft.RequestID, []byte) (raft.Result, error) {
		t.Error("a bad request was proposed")
		return raft.Result{}, raft.ErrStopped
	}, store: func(context.Context, string) (*Store, <-chan struct{}, error) { return newStore(), nil, nil }}
	for _, c := range []struct {
		method, path, body string
		header             string
		code               int
	}{
		{"PUT", "/kv/", "v", "", 400},
		{"GET", "/kv/?watch=yes", "", "", 400},
		{"GET", "/kv/?after=3", "", "", 400},
		{"GET", "/kv/?watch=1&after=now", "", "", 400},
		{"GET", "/kv/?watch=1&after=-1", "", "", 400},
		{"GET", "/kv/?watch=1", "", "Last-Event-ID: x", 400},
		{"GET", "/kv/?watch=1&after=1", "", "", 400}, // of the future
		{"GET", "/kv/k?watch=1", "", "", 400},
		{"GET", "/kv/?consistency=eventual", "", "", 400},
		{"GET", "/kv/" + strings.Repeat("k", maxKeyBytes+1), "", "", 414},
		{"GET", "/kv/k?consistency=eventual", "", "", 400},
		{"PUT", "/kv/" + strings.Repeat("k", maxKeyBytes+1), "v", "", 414},
		{"PUT", "/kv/k", strings.Repeat("v", maxValueBytes+1), "", 413},
		{"PATCH", "/kv/k", "v", "", 405},
		{"POST", "/kv/k", "v", "", 400},
		{"POST", "/kv/k?add=1.5", "", "", 400},
		{"POST", "/kv/k?add=9223372036854775808", "", "", 400},
		{"POST", "/kv/?add=1", "", "", 400},
		{"PUT", "/kv/k", "v", "Session: x; Seq: 1", 400},
		{"PUT", "/kv/k", "v", "Session: 0; Seq: 1", 400},
		{"PUT", "/kv/k", "v", "Session: 7", 400},
		{"PUT", "/kv/k", "v", "Session: 7; Seq: 0", 400},
		{"PUT", "/kv/k", "v", "Seq: 1", 400},
		{"PUT", "/kv/k", "v", "Done-Below: 1", 400},
		{"PUT", "/kv/k", "v", "Session: 7; Seq: 1; Done-Below: 2", 400},
		{"DELETE", "/kv/k", "v", "Session: 7; Seq: 1; Done-Below: all", 400},
		{"DELETE", "/sessions/x", "", "", 400},
		{"DELETE", "/sessions/0", "", "", 400},
		{"GET", "/sessions", "", "", 405},
		{"PUT", "/kv/k", "v", "If-Match: zero", 400},
		{"PUT", "/kv/k", "v", "If-Match: 0", 400},
		{"PUT", "/kv/k", "v", `If-Match: "1", "2"`, 400},
		{"DELETE", "/kv/k", "v", "If-Match: -1", 400},
		{"PUT", "/kv/k", "v", "If-None-Match: 7", 400},
	} {
		if w := ask(a, c.method, c.path, c.body, strings.Split(c.header, "; ")...); w.Code != c.code || w.Body.Len() == 0 {
			t.Errorf("%s %.20s %s: %d %q, want %d", c.method, c.path, c.header, w.Code, w.Body, c.code)
		}
	}
}

// A read is linearizable unless the client says that it need not be, and a
// wrong word is answered with the right ones.
func TestAPIReads(t *testing.T) {
	a := &api{timeout: time.Second, store: func(_ context.Context, consistency string) (*Store, <-chan struct{}, error) {
		s := newStore()
		s.Apply(raft.Entry{Index: 9, Data: command{op: opPut, key: "k", value: []byte(consistency)}.encode()})
		return s, nil, nil
	}}
	for _, c := range []struct {
		path, body, tag string
		code            int
	}{
		{"/kv/k", "linearizable", `"9"`, 200},
		{"/kv/k?consistency=linearizable", "linearizable", `"9"`, 200},
		{"/kv/k?consistency=lease", "lease", `"9"`, 200},
		{"/kv/k?consistency=stale", "stale", `"9"`, 200},
		{"/kv/k?consistency=fresh", "consistency=fresh: want linearizable, which is the default, lease or stale", "", 400},
		{"/kv/missing", "there is no key", "", 404},
		{"/kv/", `{"index":9,"keys":[{"index":9,"key":"k","value":"linearizable"}]}`, "", 200},
		{"/kv/?prefix=k&consistency=stale", `{"index":9,"keys":[{"index":9,"key":"k","value":"stale"}]}`, "", 200},
		{"/kv/?prefix=other", `{"index":9,"keys":[]}`, "", 200},
	} {
		if w := ask(a, "GET", c.path, ""); w.Code != c.code || !strings.HasPrefix(w.Body.String(), c.body) || w.Header().Get("ETag") != c.tag {
			t.Errorf("GET %s: %d %q, ETag %s", c.path, w.Code, w.Body, w.Header().Get("ETag"))
		}
	}
}

// The largest key and value that are allowed fit into a command.
func TestAPILargestCommand(t *testing.T) {
	s := newStore()
	a := &api{timeout: time.Second, propose: func(_ context.Context, _ raft.RequestID, cmd []byte) (raft.Result, error) {
		if len(cmd) > maxCommandBytes {
			t.Errorf("the command has %d bytes, the limit is %d", len(cmd), maxCommandBytes)
		}
		return raft.Result{Data: s.Apply(raft.Entry{Index: 1, Data: cmd})}, nil
	}}
	path := "/kv/" + strings.Repeat("k", maxKeyBytes)
	if w := ask(a, "PUT", path, strings.Repeat("v", maxValueBytes), ""); w.Code != http.StatusCreated {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func ask(a *api, method, path, body string, headers ...string) *httptest.ResponseRecorder {
	mux := http.NewServeMux()
	a.register(mux)
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for _, h := range headers {
		if name, value, ok := strings.Cut(h, ": "); ok {
			r.Header.Set(name, value)
		}
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, r)
	return w
}
