package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"example.com/raft"
)

// api serves the store over HTTP:
//
//	PUT    /kv/{key}        writes the body              200, or 201 if the key is new
//	POST   /kv/{key}?add=N  adds to a decimal number     200 or 201, the body is the sum
//	GET    /kv/{key}        reads                        200 or 404
//	DELETE /kv/{key}        deletes                      204 or 404
//	GET    /kv/?prefix=P    lists keys                   200; with &watch=1 their changes (watch.go)
//	POST   /sessions        opens a session              201, the header Session names it
//	DELETE /sessions/{id}   closes it                    204
//
// A read is ?consistency=linearizable, the default, lease, or stale, which is
// what this node has now. ETag is the key's version, in quotes. Compare-and-set
// is a write with "If-Match: VERSION" (this version), "If-Match: *" (any, the key
// exists) or "If-None-Match: *" (the key does not exist); 412 answers that it
// does not hold. A write with the headers Session, Seq and Done-Below, which are
// raft.RequestID, takes effect once however often it is sent (client/client.go).
// "Outcome: unknown" marks answers to writes that may have been executed, or may
// be later. Every node takes every request: one that does not lead hands it to
// the leader.
type api struct {
	propose func(ctx context.Context, id raft.RequestID, cmd []byte) (raft.Result, error) // of no session: the zero id
	open    func(context.Context) (raft.SessionID, error)
	end     func(context.Context, raft.SessionID) error
	store   func(ctx context.Context, consistency string) (s *Store, ended <-chan struct{}, err error)
	timeout time.Duration // how long a request may wait for a leader and a majority
}

// The consistencies of a read.
const (
	linearizable = "linearizable" // includes every write acknowledged before the request
	lease        = "lease"        // the same, as long as clocks run at about the same rate
	stale        = "stale"        // what this node has now
)

func (a *api) register(mux *http.ServeMux) {
	mux.HandleFunc("GET /kv/{key...}", a.get)
	mux.HandleFunc("PUT /kv/{key...}", a.put)
	mux.HandleFunc("POST /kv/{key...}", a.add)
	mux.HandleFunc("DELETE /kv/{key...}", a.delete)
	mux.HandleFunc("POST /sessions", a.openSession)
	mux.HandleFunc("DELETE /sessions/{id}", a.closeSession)
}

// get reads from this node, after it has made sure that it holds every write
// that was acknowledged before, unless the client can do without.
func (a *api) get(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("key") == "" { // no pattern: {$} matches the key "/" too
		a.prefix(w, r)
		return
	}
	key, ok := readKey(w, r)
	if !ok {
		return
	}
	if q := r.URL.Query(); q.Has("watch") || q.Has("prefix") || q.Has("after") {
		fail(w, http.StatusBadRequest, "prefix, watch and after go with the path /kv/: use /kv/?prefix=PREFIX&watch=1")
		return
	}
	store, _, ok := a.storeFor(w, r, r.URL.Query().Get("consistency"))
	if !ok {
		return
	}
	it := store.get(key)
	if it.version == 0 {
		answer(w, command{key: key}, result{status: statusNotFound})
		return
	}
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("ETag", fmt.Sprintf(`"%d"`, it.version))
	// What was stored is data, never a page of this site.
	header.Set("Content-Type", "application/octet-stream")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Length", strconv.Itoa(len(it.value)))
	w.Write(it.value)
}

// storeFor returns the store when it may be read. If it may not, it answers the
// request itself.
func (a *api) storeFor(w http.ResponseWriter, r *http.Request, consistency string) (store *Store, ended <-chan struct{}, ok bool) {
	consistency = cmp.Or(consistency, linearizable)
	if !slices.Contains([]string{linearizable, lease, stale}, consistency) {
		fail(w, http.StatusBadRequest, "consistency=%s: want %s, which is the default, %s or %s", consistency, linearizable, lease, stale)
		return nil, nil, false
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	store, ended, err := a.store(ctx, consistency)
	if err != nil {
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, "%v\nA read changes nothing: send it again, to this node or another.", err)
		return nil, nil, false
	}
	return store, ended, true
}

// readKey answers the request itself if its key is no key.
func readKey(w http.ResponseWriter, r *http.Request) (string, bool) {
	key := r.PathValue("key")
	switch {
	case key == "":
		fail(w, http.StatusBadRequest, "the path has no key: use /kv/KEY")
	case len(key) > maxKeyBytes:
		fail(w, http.StatusRequestURITooLong, "the key has %d bytes, the limit is %d", len(key), maxKeyBytes)
	default:
		return key, true
	}
	return "", false
}

func (a *api) put(w http.ResponseWriter, r *http.Request) {
	condition, ok := readCondition(w, r)
	if !ok {
		return
	}
	value, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxValueBytes))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		fail(w, http.StatusRequestEntityTooLarge, "the value is larger than %d bytes", maxValueBytes)
		return
	}
	if err != nil {
		fail(w, http.StatusBadRequest, "reading the value: %v; nothing was written", err)
		return
	}
	a.run(w, r, command{op: opPut, condition: condition, value: value})
}

func (a *api) delete(w http.ResponseWriter, r *http.Request) {
	if condition, ok := readCondition(w, r); ok {
		a.run(w, r, command{op: opDelete, condition: condition})
	}
}

func (a *api) add(w http.ResponseWriter, r *http.Request) {
	condition, ok := readCondition(w, r)
	if !ok {
		return
	}
	n, err := strconv.ParseInt(r.URL.Query().Get("add"), 10, 64)
	if err != nil {
		fail(w, http.StatusBadRequest, "add=%s: want a number of at most 64 bits, as in POST /kv/KEY?add=1; PUT writes a value", r.URL.Query().Get("add"))
		return
	}
	a.run(w, r, command{op: opAdd, condition: condition, value: strconv.AppendInt(nil, n, 10)})
}

func (a *api) openSession(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	id, err := a.open(ctx)
	if err != nil {
		refuse(w, err, raft.RequestID{})
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Session", fmt.Sprint(id))
	w.WriteHeader(http.StatusCreated)
	fmt.Fprintf(w, "session %d\n", id)
}

func (a *api) closeSession(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 64)
	if err != nil || id == 0 {
		fail(w, http.StatusBadRequest, "%q is no session: POST /sessions opens one and names it", r.PathValue("id"))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	if err := a.end(ctx, raft.SessionID(id)); err != nil {
		refuse(w, err, raft.RequestID{})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// readRequestID answers the request itself if its session's headers are wrong.
// Without any of them the request has no ID.
func readRequestID(w http.ResponseWriter, r *http.Request) (id raft.RequestID, ok bool) {
	header := r.Header
	if header.Get("Session") == "" && header.Get("Seq") == "" && header.Get("Done-Below") == "" {
		return id, true
	}
	session, err := strconv.ParseUint(header.Get("Session"), 10, 64)
	if err != nil || session == 0 {
		fail(w, http.StatusBadRequest, "Session: %s: want the session that POST /sessions has opened; nothing was changed", header.Get("Session"))
		return id, false
	}
	id.Session = raft.SessionID(session)
	id.Seq, err = strconv.ParseUint(header.Get("Seq"), 10, 64)
	if err != nil || id.Seq == 0 {
		fail(w, http.StatusBadRequest, "Seq: %s: want this request's number in the session, from 1 on; nothing was changed", header.Get("Seq"))
		return id, false
	}
	if below := header.Get("Done-Below"); below != "" {
		id.DoneBelow, err = strconv.ParseUint(below, 10, 64)
		if err != nil || id.DoneBelow > id.Seq {
			fail(w, http.StatusBadRequest, "Done-Below: %s: want the lowest Seq without an answer, at most this request's; nothing was changed", below)
			return id, false
		}
	}
	return id, true
}

// readCondition answers the request itself if its condition can't be understood.
func readCondition(w http.ResponseWriter, r *http.Request) (condition, bool) {
	match, noneMatch := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
	switch {
	case match != "" && noneMatch != "":
		fail(w, http.StatusBadRequest, "give If-Match or If-None-Match, not both")
		return condition{}, false
	case noneMatch == "*":
		return condition{kind: ifMissing}, true
	case noneMatch != "":
		fail(w, http.StatusBadRequest, "If-None-Match: %s: only * is understood (write if the key does not exist)", noneMatch)
		return condition{}, false
	case match == "*":
		return condition{kind: ifPresent}, true
	case match == "":
		return condition{}, true
	}
	version, err := strconv.ParseUint(strings.Trim(match, `"`), 10, 64)
	if err != nil || version == 0 {
		fail(w, http.StatusBadRequest, "If-Match: %s: want one version, as in the ETag of an answer, or *", match)
		return condition{}, false
	}
	return condition{ifVersion, raft.Index(version)}, true
}

// run puts c through the log and answers with its result.
func (a *api) run(w http.ResponseWriter, r *http.Request, c command) {
	var ok bool
	if c.key, ok = readKey(w, r); !ok {
		return
	}
	id, ok := readRequestID(w, r)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	committed, err := a.propose(ctx, id, c.encode())
	if err != nil {
		refuse(w, err, id)
		return
	}
	res, err := decodeResult(committed.Data)
	if err != nil {
		fail(w, http.StatusInternalServerError, "%v", err)
		return
	}
	answer(w, c, res)
}

// answer translates what the state machine decided.
func answer(w http.ResponseWriter, c command, res result) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	if res.version != 0 {
		header.Set("ETag", fmt.Sprintf(`"%d"`, res.version))
	}
	switch res.status {
	case statusNotFound:
		fail(w, http.StatusNotFound, "there is no key %q", c.key)
	case statusConflict:
		if res.version == 0 {
			fail(w, http.StatusPreconditionFailed, "there is no key %q; nothing was changed", c.key)
		} else {
			fail(w, http.StatusPreconditionFailed, "key %q is at version %d; nothing was changed", c.key, res.version)
		}
	case statusNoNumber:
		fail(w, http.StatusConflict, "key %q is at version %d: %s; nothing was changed", c.key, res.version, res.value)
	case statusOK, statusCreated:
		if c.op == opDelete {
			header.Del("ETag")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		if res.status == statusCreated {
			w.WriteHeader(http.StatusCreated)
		}
		if c.op == opAdd {
			fmt.Fprintf(w, "%s\n", res.value)
		} else {
			fmt.Fprintf(w, "version %d\n", res.version)
		}
	default:
		fail(w, http.StatusInternalServerError, "the command was refused: %s", res.value)
	}
}

// refuse translates an error of a request that changes something. The
// distinction that matters to a client: may it simply send the request again?
func refuse(w http.ResponseWriter, err error, id raft.RequestID) {
	var session *raft.SessionError
	var size *raft.ResultSizeError
	if errors.Is(err, raft.ErrOutcomeUnknown) {
		w.Header().Set("Outcome", "unknown")
	}
	switch {
	case errors.Is(err, raft.ErrSessionExpired):
		fail(w, http.StatusGone, "%v", err)
	case errors.As(err, &session) && session.Reason == raft.SessionWindow:
		fail(w, http.StatusTooManyRequests, "%v", err)
	case errors.As(err, &session):
		fail(w, http.StatusConflict, "%v", err)
	case errors.Is(err, raft.ErrCommandSize):
		fail(w, http.StatusRequestEntityTooLarge, "%v", err)
	case errors.As(err, &size):
		fail(w, http.StatusInternalServerError, "%v", err)
	case errors.Is(err, raft.ErrOutcomeUnknown) && id.Session != 0:
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusGatewayTimeout, "%v\nThe outcome is unknown. Send it again with the same Session and Seq, to this node or another: it takes effect once.", err)
	case errors.Is(err, raft.ErrOutcomeUnknown):
		fail(w, http.StatusGatewayTimeout, "%v\nThe outcome is unknown: it may have been done, or may be later. Read before deciding, or make the request conditional with If-Match, or send it in a session.", err)
	default:
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, "%v\nNothing was changed: send it again, to this node or another.", err)
	}
}

func fail(w http.ResponseWriter, code int, format string, args ...any) {
	http.Error(w, fmt.Sprintf(format, args...), code)
}

// newHTTPServer returns a server with limits on how long a client may take.
func newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           http.NewCrossOriginProtection().Handler(h), // other sites must not press our buttons
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // clients that hang up
	}
}
